//! As much of DNS's message format (RFC 1035) as a forwarder needs. Pure; every byte may come from a stranger.

use std::net::{IpAddr, Ipv4Addr};

pub(super) const HEADER_BYTES: usize = 12;
/// In the third byte: a response; the operation, 0 for a query; cut short; recursion desired.
const FLAG_RESPONSE: u8 = 0x80;
const OPERATION: u8 = 0x78;
const FLAG_TRUNCATED: u8 = 0x02;
const FLAG_RECURSION_DESIRED: u8 = 0x01;
/// In the fourth byte: recursion available; the codes of failures.
const FLAG_RECURSION_AVAILABLE: u8 = 0x80;
pub(super) const REFUSED: u8 = 5;
pub(super) const SERVFAIL: u8 = 2;

/// Of our own answers.
const TIME_TO_LIVE_S: u8 = 60;
const LABEL_BYTES_MAX: u8 = 63;
const POINTER: u8 = 0xc0;
/// Type A, class IN.
const ADDRESS: [u8; 4] = [0, 1, 0, 1];
/// Type AAAA, class IN.
const ADDRESS_V6: [u8; 4] = [0, 28, 0, 1];
/// A name that points to the question's.
const SAME_NAME: [u8; 2] = [POINTER, 12];
/// Of our own answers: they stay below what UDP carries, and their count in one byte.
const RECORDS_MAX: usize = 8;
/// Of a record: type, class, time to live, length of the data.
const RECORD_HEAD_BYTES: usize = 10;

/// The name that a standard query with exactly one question asks for, in lower case without the final dot.
pub(super) fn question_name(message: &[u8]) -> Option<String> {
    let header = message.get(..HEADER_BYTES)?;
    let is_query = header[2] & (FLAG_RESPONSE | OPERATION) == 0 && header[4..6] == [0, 1];
    if !is_query {
        return None;
    }
    let mut labels = Vec::new();
    let mut rest = message.get(HEADER_BYTES..)?;
    loop {
        let (&length, after) = rest.split_first()?;
        if length == 0 {
            // Type and class follow.
            return (after.len() >= 4).then(|| labels.join("."));
        }
        // A question needs no compression; two set bits would be a pointer.
        let label = after.get(..usize::from(length)).filter(|_| length <= LABEL_BYTES_MAX)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        rest = after.get(usize::from(length)..)?;
    }
}

/// An answer that repeats the question and says why there is nothing else.
pub(super) fn failure(question: &[u8], code: u8) -> Vec<u8> {
    let mut answer = question.get(..question_end(question)).unwrap_or(question).to_vec();
    if let Some(header) = answer.get_mut(..HEADER_BYTES) {
        header[2] |= FLAG_RESPONSE;
        header[3] = FLAG_RECURSION_AVAILABLE | code;
        // No answers, authorities and additional records: what followed the question was cut off.
        header[6..].fill(0);
    }
    answer
}

/// An answer with those of `addresses` that are of the kind asked for; without any when something else was asked for.
pub(in super::super) fn addresses_answer(question: &[u8], addresses: &[IpAddr]) -> Vec<u8> {
    let mut answer = failure(question, 0);
    let is_v6 = answer.ends_with(&ADDRESS_V6);
    if !is_v6 && !answer.ends_with(&ADDRESS) {
        return answer;
    }
    for address in addresses.iter().filter(|address| address.is_ipv6() == is_v6).take(RECORDS_MAX) {
        if let Some(count) = answer.get_mut(7) {
            *count += 1;
        }
        answer.extend(SAME_NAME);
        match address {
            IpAddr::V4(address) => record(&mut answer, ADDRESS, &address.octets()),
            IpAddr::V6(address) => record(&mut answer, ADDRESS_V6, &address.octets()),
        }
    }
    answer
}

fn record<const N: usize>(answer: &mut Vec<u8>, kind: [u8; 4], data: &[u8; N]) {
    answer.extend(kind);
    answer.extend([0, 0, 0, TIME_TO_LIVE_S, 0, u8::try_from(N).unwrap_or_default()]);
    answer.extend(data);
}

/// Where the only question of a message that [`question_name`] has read ends.
fn question_end(message: &[u8]) -> usize {
    let mut end = HEADER_BYTES;
    while let Some(&length) = message.get(end).filter(|length| **length != 0) {
        end += 1 + usize::from(length);
    }
    (end + 5).min(message.len())
}

/// A question for the IPv4 addresses of `name`, whose labels are short enough because it was parsed before.
pub(in super::super) fn query(name: &str, id: [u8; 2]) -> Vec<u8> {
    let mut message = vec![id[0], id[1], FLAG_RECURSION_DESIRED, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        message.push(u8::try_from(label.len()).unwrap_or(LABEL_BYTES_MAX));
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(ADDRESS);
    message
}

pub(super) fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & FLAG_TRUNCATED != 0)
}

/// The IPv4 addresses among the answers; `None` for a message that ends too early.
pub(in super::super) fn addresses(message: &[u8]) -> Option<Vec<Ipv4Addr>> {
    let count = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    let (questions, answers) = (count(4)?, count(6)?);
    let mut at = HEADER_BYTES;
    for _ in 0..questions {
        at = name_end(message, at)? + ADDRESS.len();
    }
    let mut found = Vec::new();
    for _ in 0..answers {
        at = name_end(message, at)?;
        let kind = message.get(at..at + ADDRESS.len())?;
        let data_bytes = usize::from(count(at + RECORD_HEAD_BYTES - 2)?);
        at += RECORD_HEAD_BYTES;
        let data = message.get(at..at + data_bytes)?;
        at += data_bytes;
        if let (true, Ok(octets)) = (kind == ADDRESS, <[u8; 4]>::try_from(data)) {
            found.push(octets.into());
        }
    }
    Some(found)
}

/// Where a name ends: behind its empty label or its pointer.
fn name_end(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & POINTER == POINTER => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EDNS: [u8; 11] = [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];

    /// A question as programs ask it, with an EDNS record behind it.
    fn edns_query(name: &str) -> Vec<u8> {
        let mut message = query(name, [0x12, 0x34]);
        message[11] = 1;
        message.extend(EDNS);
        message
    }

    #[test]
    fn the_name_of_a_question_is_read_in_lower_case() {
        assert_eq!(question_name(&edns_query("WWW.Example.com")).as_deref(), Some("www.example.com"));
        assert_eq!(question_name(&edns_query("")).as_deref(), Some(""));
    }

    #[test]
    fn what_is_no_single_question_is_ignored() {
        let mut answer = edns_query("a.b");
        answer[2] |= FLAG_RESPONSE;
        let mut two = edns_query("a.b");
        two[5] = 2;
        let mut pointer = edns_query("a.b");
        pointer[HEADER_BYTES] = 0xc0;
        for message in [answer, two, pointer, vec![0; 11], edns_query("a.b")[..14].to_vec()] {
            assert_eq!(question_name(&message), None, "{message:?}");
        }
    }

    #[test]
    fn a_refusal_repeats_the_question_and_nothing_else() {
        let question = edns_query("denied.example");
        let answer = failure(&question, REFUSED);
        assert_eq!(answer[..2], question[..2]);
        assert_eq!((answer[2], answer[3], &answer[4..12]), (0x81, 0x85, &[0, 1, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(answer[HEADER_BYTES..], question[HEADER_BYTES..question.len() - EDNS.len()]);
    }

    #[test]
    fn an_address_is_answered_to_who_asks_for_one_and_to_nobody_else() {
        let here = Ipv4Addr::new(10, 254, 0, 1);
        let both = [IpAddr::V4(here), "::1".parse().unwrap()];
        assert_eq!(addresses(&addresses_answer(&edns_query("x.box.test"), &both)), Some(vec![here]));
        let asking = |kind: u8| {
            let mut question = query("x.box.test", [1, 2]);
            let at = question.len() - 3;
            question[at] = kind;
            question
        };
        let sixth = addresses_answer(&asking(28), &both);
        assert!(sixth[7] == 1 && sixth.ends_with(&[0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), "{sixth:?}");
        assert_eq!(addresses_answer(&asking(28), &both[..1])[7], 0, "no such address");
        assert_eq!(addresses_answer(&asking(16), &both), failure(&asking(16), 0), "a text");
    }

    #[test]
    fn addresses_are_found_among_other_records() {
        let mut answer = query("a.example", [1, 2]);
        answer[2] |= FLAG_RESPONSE;
        answer[7] = 3;
        // A CNAME, then two addresses, their names pointing back into the question.
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'b', 0xc0, 14]);
        answer.extend([0xc0, 39, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 2, 3, 4]);
        answer.extend([1, b'b', 0xc0, 14, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 5, 6, 7, 8]);
        assert_eq!(addresses(&answer), Some(vec![Ipv4Addr::new(1, 2, 3, 4), Ipv4Addr::new(5, 6, 7, 8)]));
        answer.pop();
        assert_eq!(addresses(&answer), None, "the last record is torn");
        assert_eq!(addresses(&query("a.example", [1, 2])), Some(vec![]));
    }

    proptest! {
        #[test]
        fn no_message_makes_the_responder_panic(message in proptest::collection::vec(any::<u8>(), 0..64)) {
            question_name(&message);
            failure(&message, REFUSED);
            addresses_answer(&message, &[Ipv4Addr::LOCALHOST.into()]);
            addresses(&message);
        }
    }
}
