//! Services of the internet that tests make themselves: names, and a SOCKS5 proxy.

use super::world::{EIGHT, HOST, LAN_MACHINE, NINE, ONE, SECURE};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};

/// Where the proxy is.
pub(crate) const PROXY: &str = "proxy.example:1080";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const NAMES: [(&str, Ipv4Addr); 8] = [
    ("one.example", ONE),
    ("nine.example", NINE),
    ("proxy.example", GATEWAY),
    ("lan.example", LAN_MACHINE),
    ("host.example", HOST),
    ("secure.example", SECURE),
    ("api.secure.example", SECURE),
    ("impostor.example", SECURE),
];

/// A question for the IPv4 addresses of a name.
pub(crate) fn question(name: &str) -> Vec<u8> {
    let mut question = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap());
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

/// What a name server says: the first address, or else the failure's code.
pub(crate) fn ask_name(server: Ipv4Addr, name: &str) -> io::Result<Result<Ipv4Addr, u8>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    socket.connect((server, 53))?;
    socket.send(&question(name))?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    Ok(read_answer(&answer[..length], name))
}

/// The same over TCP.
pub(crate) fn ask_name_tcp(server: Ipv4Addr, name: &str) -> io::Result<Result<Ipv4Addr, u8>> {
    let mut stream = TcpStream::connect((server, 53))?;
    let question = question(name);
    stream.write_all(&[&u16::try_from(question.len()).unwrap().to_be_bytes()[..], &question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(read_answer(&answer, name))
}

fn read_answer(answer: &[u8], name: &str) -> Result<Ipv4Addr, u8> {
    let question = question(name);
    assert_eq!((&answer[..2], &answer[12..question.len()]), (&question[..2], &question[12..]), "id and question come back");
    match answer[3] & 0x0f {
        0 => Ok(<[u8; 4]>::try_from(&answer[answer.len() - 4..]).unwrap().into()),
        code => Err(code),
    }
}

/// Answers for [`NAMES`] in the netns of the calling thread, over UDP and TCP.
pub(crate) fn serve_names() {
    let socket = UdpSocket::bind((EIGHT, 53)).unwrap();
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, asker)) = socket.recv_from(&mut question) {
            socket.send_to(&answer_name(&question[..length]), asker).unwrap();
        }
    });
    let listener = TcpListener::bind((EIGHT, 53)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer_name_tcp(stream.unwrap()).unwrap();
        }
    });
}

fn answer_name_tcp(mut stream: TcpStream) -> io::Result<()> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut question = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut question)?;
    let answer = answer_name(&question);
    stream.write_all(&[&u16::try_from(answer.len()).unwrap().to_be_bytes()[..], &answer].concat())
}

fn answer_name(asked: &[u8]) -> Vec<u8> {
    let mut answer = asked.to_vec();
    answer[2] |= 0x80;
    match NAMES.iter().find(|(name, _)| question(name)[12..] == asked[12..]) {
        Some((_, address)) => {
            answer[7] = 1;
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(address.octets());
        }
        None => answer[3] |= 3,
    }
    answer
}

/// A proxy without authentication in the netns of the calling thread. It plays every destination itself and says which.
pub(crate) fn serve_socks() {
    let listener = TcpListener::bind((GATEWAY, 1080)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || pretend(stream.unwrap()));
        }
    });
}

fn pretend(mut stream: TcpStream) -> io::Result<()> {
    let mut greeting = [0; 3];
    stream.read_exact(&mut greeting)?;
    stream.write_all(&[5, 0])?;
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let destination = if head[3] == 1 {
        let mut rest = [0; 5];
        stream.read_exact(&mut rest)?;
        Ipv4Addr::new(head[4], rest[0], rest[1], rest[2]).to_string()
    } else {
        let mut rest = vec![0; usize::from(head[4]) + 2];
        stream.read_exact(&mut rest)?;
        String::from_utf8_lossy(&rest[..usize::from(head[4])]).into_owned()
    };
    stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    assert_ne!(stream.read(&mut [0; 4096])?, 0, "a question");
    stream.write_all(format!("{destination} by proxy").as_bytes())
}
