//! A node that a real systemd boots: PID 1 of a container, with its own dbus-daemon, logind and journal, and the unit
//! as it is shipped. Only rpm-ostreed, its finalizer and the kubelet are played, by services of the container
//! ([`node`]); the cluster and the registry are outside, on the same loopback ([`outside`]).

pub mod container;
pub mod directives;
pub mod node;
pub mod outside;
pub mod sandbox;
pub mod story;
