"""Data for tasks: images with labels, sentences with labels, running text, questions with answers."""
