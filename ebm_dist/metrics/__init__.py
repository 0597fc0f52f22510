"""What a run says about itself: names, the hub that writes them, and the live view."""
