"""Objectives that tell data from noise or from neighbours."""
