"""What a rank holds of the composed model, and how soft tokens move between its modules."""
