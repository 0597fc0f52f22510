"""Types that every other folder uses: events, weights, config sections, seeds and errors."""
