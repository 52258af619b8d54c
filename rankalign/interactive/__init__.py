"""People at the keyboard: talking to a model, voting between two, ranking answers."""
