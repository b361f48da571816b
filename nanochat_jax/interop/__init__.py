"""Other projects' names and formats for our weights."""
