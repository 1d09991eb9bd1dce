"""What an adapter costs. `verbs` has the two functions, `figures` what they return; each other module measures one thing."""
