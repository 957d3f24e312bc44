"""The sections of a page, one file for each subject: from a run to blocks of content."""
