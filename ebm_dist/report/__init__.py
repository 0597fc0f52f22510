"""Pictures and pages made from what a run leaves behind."""
