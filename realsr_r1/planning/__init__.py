"""What a training costs in time, memory and money."""
