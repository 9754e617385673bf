"""What volseg does with volumes, stage by stage: check, plan, train, predict, evaluate, export."""
