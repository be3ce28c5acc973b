"""Programs that meta-train and compare methods for the files in results/."""
