"""The head of a cluster. What is decided is pure (state, events, settle and what these call, answer_rules), what is
done is thin (coordinator, head, commands, answers, control_desk, clients, own_agent)."""
