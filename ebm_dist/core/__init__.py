"""The nouns that cross every boundary: events, weights, sections, seeds and errors."""
