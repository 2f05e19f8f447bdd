"""What a ResQ checkpoint and a ResQ KV page look like: read by the offline tools, the plugin and every kernel."""
