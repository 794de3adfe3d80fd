//! Turns proto/descriptor.binpb into service traits and messages. The descriptor is checked in, so that building needs
//! no protoc; after an edit of a .proto file it is made anew by
//!
//! ```sh
//! cd agent/proto && protoc --include_imports -o descriptor.binpb process.proto filesystem.proto && sha256sum *.proto > descriptor.sha256
//! ```
//!
//! A test in rpc/mod.rs fails when a .proto file has changed and the descriptor has not.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    #[cfg(feature = "agent")]
    connectrpc_build::Config::new()
        .files(&["process.proto", "filesystem.proto"])
        .descriptor_set("proto/descriptor.binpb")
        .emit_rerun_directives(false)
        .gate_client_feature(true)
        .include_file("envd.rs")
        .compile()?;
    Ok(())
}
