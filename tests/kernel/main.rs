//! Black-box tests of the kernel side. They need root; nothing of them touches the machine's own network or its data.

// Marked as what they are, so that clippy lets helpers of tests unwrap as tests do.
#[cfg(test)]
mod device_policy;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod killed;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod network;
#[cfg(test)]
mod roots;
#[cfg(test)]
mod sandbox;
#[cfg(test)]
mod volumes;
