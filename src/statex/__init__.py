"""statex: enlarge the recurrent state of a pre-trained language model."""
