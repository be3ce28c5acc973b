"""Studies: what is meta-trained and compared for the results files, one binary each."""
