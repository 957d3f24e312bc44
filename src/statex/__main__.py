"""`python -m statex` is `statex`; torchrun starts it this way."""

from statex.cli import main

if __name__ == "__main__":
    main()
