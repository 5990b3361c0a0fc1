"""How good the pictures and the words are: metrics, data sets, other methods, tables."""
