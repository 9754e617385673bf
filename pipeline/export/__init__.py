"""One module a format; each export is read back and compared before it is called done."""
