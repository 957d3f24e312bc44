"""How content is written and drawn: HTML, Markdown, pictures, tables."""
