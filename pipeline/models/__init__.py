"""The networks: one U-Net whose every choice is a value, and a visible dict of builders."""
