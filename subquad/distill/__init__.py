"""Training of students: losses, training passes, schedules, the training loop, and what it reads and writes."""
