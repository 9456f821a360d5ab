"""What a vector does to a model: answers, judged and counted. Import from the modules."""
