"""The files of the page, as the browser gets them; niivue.js is fetched when volseg is built."""
