"""Where an update's negatives come from, and how they get to the learners."""
