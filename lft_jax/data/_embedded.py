"""Image sources that are embedded in other packages."""

#: Sources that need no download, and the fractions of their train, validation and test splits.
EMBEDDED = {"digits": (0.6, 0.2, 0.2), "mnist_5k": (0.7, 0.1, 0.2)}
