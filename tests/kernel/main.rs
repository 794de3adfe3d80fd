//! Black-box tests of the kernel side. They need root; nothing of them touches the machine's own network or its data.

mod device_policy;
mod guest;
mod lifecycle;
mod machine;
mod network;
mod sandbox;
