"""Models of transformers' at work: what they lack to be run, trained and looked into."""
