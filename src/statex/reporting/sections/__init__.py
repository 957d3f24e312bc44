"""The sections of a page, one file per subject: from a run to blocks of content."""
