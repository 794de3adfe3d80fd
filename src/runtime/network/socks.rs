//! The client's side of SOCKS5 (RFC 1928, user name and password by RFC 1929).

use super::gate::Target;
use crate::model::EgressProxy;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const PASSWORD: u8 = 2;
const PASSWORD_VERSION: u8 = 1;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
const SUCCEEDED: u8 = 0;

/// Asks the proxy at the other end of `stream` for a connection to `target`; afterwards the stream is that connection.
pub(super) async fn connect<S>(stream: &mut S, proxy: &EgressProxy, target: &Target) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    agree(stream, proxy).await?;
    stream.write_all(&request(target)?).await?;
    let [version, outcome, _, kind] = read_array(stream).await?;
    if version != VERSION || outcome != SUCCEEDED {
        return Err(refused(format!("the egress proxy answered {outcome}")));
    }
    let bound_bytes = match kind {
        IPV4 => 4,
        IPV6 => 16,
        NAME => stream.read_u8().await?.into(),
        _ => return Err(refused(format!("the egress proxy speaks of address kind {kind}"))),
    };
    // Where it connects from, and the port: nobody here needs to know.
    stream.read_exact(&mut vec![0; bound_bytes + 2]).await.map(|_| ())
}

async fn agree<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, proxy: &EgressProxy) -> io::Result<()> {
    let greeting: &[u8] =
        if proxy.username.is_some() { &[VERSION, 2, NO_AUTHENTICATION, PASSWORD] } else { &[VERSION, 1, NO_AUTHENTICATION] };
    stream.write_all(greeting).await?;
    match (read_array(stream).await?, &proxy.username) {
        ([VERSION, NO_AUTHENTICATION], _) => Ok(()),
        ([VERSION, PASSWORD], Some(username)) => log_in(stream, username, proxy.password.as_deref().unwrap_or_default()).await,
        _ => Err(refused("the egress proxy wants another kind of authentication".to_owned())),
    }
}

async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, username: &str, password: &str) -> io::Result<()> {
    let mut message = vec![PASSWORD_VERSION];
    push_short(&mut message, username)?;
    push_short(&mut message, password)?;
    stream.write_all(&message).await?;
    match read_array(stream).await? {
        [_, SUCCEEDED] => Ok(()),
        _ => Err(refused("the egress proxy does not accept the user name and password".to_owned())),
    }
}

fn request(target: &Target) -> io::Result<Vec<u8>> {
    let mut message = vec![VERSION, CONNECT, 0];
    let port = match target {
        Target::Address(address) => {
            message.push(IPV4);
            message.extend(address.ip().octets());
            address.port()
        }
        Target::Name(name, port) => {
            message.push(NAME);
            push_short(&mut message, name)?;
            *port
        }
    };
    message.extend(port.to_be_bytes());
    Ok(message)
}

fn push_short(message: &mut Vec<u8>, text: &str) -> io::Result<()> {
    message.push(u8::try_from(text.len()).map_err(|_| refused("SOCKS5 carries at most 255 bytes of a name".to_owned()))?);
    message.extend(text.as_bytes());
    Ok(())
}

async fn read_array<S: AsyncRead + Unpin, const N: usize>(stream: &mut S) -> io::Result<[u8; N]> {
    let mut array = [0; N];
    stream.read_exact(&mut array).await?;
    Ok(array)
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(login: Option<(&str, &str)>) -> EgressProxy {
        let (username, password) = login.map(|(name, word)| (name.to_owned(), word.to_owned())).unzip();
        EgressProxy { address: "proxy:1080".to_owned(), username, password }
    }

    /// Plays the proxy: what it is to read and what it then says, in turn.
    async fn play(proxy: EgressProxy, target: Target, script: &[(&[u8], &[u8])]) -> io::Result<()> {
        let (mut client, mut server) = tokio::io::duplex(512);
        let asking = tokio::spawn(async move { connect(&mut client, &proxy, &target).await });
        for (expected, answer) in script {
            let mut said = vec![0; expected.len()];
            server.read_exact(&mut said).await.unwrap();
            assert_eq!(said, *expected);
            server.write_all(answer).await.unwrap();
        }
        asking.await.unwrap()
    }

    #[tokio::test]
    async fn a_name_is_handed_to_the_proxy_unresolved() {
        let script: [(&[u8], &[u8]); 2] = [(&[5, 1, 0], &[5, 0]), (b"\x05\x01\x00\x03\x03a.b\x01\xbb", &[5, 0, 0, 1, 9, 9, 9, 9, 0, 80])];
        play(proxy(None), Target::Name("a.b".to_owned(), 443), &script).await.unwrap();
    }

    #[tokio::test]
    async fn user_name_and_password_are_given_when_asked_for() {
        let address = Target::Address("1.2.3.4:80".parse().unwrap());
        let script: [(&[u8], &[u8]); 3] =
            [(&[5, 2, 0, 2], &[5, 2]), (b"\x01\x01u\x02pw", &[1, 0]), (&[5, 1, 0, 1, 1, 2, 3, 4, 0, 80], &[5, 0, 0, 3, 1, b'x', 0, 1])];
        play(proxy(Some(("u", "pw"))), address, &script).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_of_the_proxy_is_a_refused_connection() {
        let address = || Target::Address("1.2.3.4:80".parse().unwrap());
        let late: [(&[u8], &[u8]); 2] = [(&[5, 1, 0], &[5, 0]), (&[5, 1, 0, 1, 1, 2, 3, 4, 0, 80], &[5, 2, 0, 1])];
        let early: [(&[u8], &[u8]); 1] = [(&[5, 1, 0], &[5, 0xff])];
        for script in [&late[..], &early[..]] {
            assert_eq!(play(proxy(None), address(), script).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}
