"""The first form of the method, which the apparatus and the lessons still use; it goes as they are
moved to the second."""
