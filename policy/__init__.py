"""Every grant and every limit, as data: the code loads it and repeats nothing of it. Read README.md first."""
