"""`volseg view`: a result in the browser, served on loopback only."""
