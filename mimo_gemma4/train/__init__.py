"""From a configuration to a trained model: setup, schedule, step, evaluation, records."""
