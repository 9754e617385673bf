"""Other people's formats of trained models: the way in, and the way out."""
