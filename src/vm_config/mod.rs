//! Cloud Hypervisor's configuration objects, in its own spelling.
