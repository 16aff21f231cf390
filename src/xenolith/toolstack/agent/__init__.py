"""Working inside a guest: the other end of the agent that our initramfs starts there (guests/agent/agent.c).

`frames` is what goes over the channel, `session` a conversation with one agent and the commands it runs, `running` a
command from its start to its end, `files` copies files by the `tar` of the guest.  An agent is as hostile as its
guest: what it sends is bounded and checked, and one that breaks the protocol is not listened to any more.
"""
