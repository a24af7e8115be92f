//! The messages of CRIU's images, field by field: what is not changed stays byte for byte.

use std::ops::RangeInclusive;

use protobuf::{CodedInputStream, CodedOutputStream};

/// What every image begins with.
pub(super) const COMMON: u32 = 0x5456_4319;

/// The numbers that a field can have.
const FIELDS: RangeInclusive<u32> = 1..=(1 << 29) - 1;

/// The value of a field, by how it is written.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Varint(u64),
    Fixed64(u64),
    Bytes(Vec<u8>),
    Fixed32(u32),
}

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Message(Vec<(u32, Value)>);

impl Message {
    /// Takes a message apart; none when it would not be the same when put together again.
    pub(super) fn parse(bytes: &[u8]) -> Option<Message> {
        let mut input = CodedInputStream::from_bytes(bytes);
        let mut fields = Vec::new();
        while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
            let value = match tag & 7 {
                0 => Value::Varint(input.read_raw_varint64().ok()?),
                1 => Value::Fixed64(input.read_fixed64().ok()?),
                2 => Value::Bytes(input.read_bytes().ok()?),
                5 => Value::Fixed32(input.read_fixed32().ok()?),
                _ => return None,
            };
            // No other can be written.
            let field = Some(tag >> 3).filter(|field| FIELDS.contains(field))?;
            fields.push((field, value));
        }
        let message = Message(fields);
        (message.encode()? == bytes).then_some(message)
    }

    /// Puts it together.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut output = CodedOutputStream::vec(&mut bytes);
        for (field, value) in &self.0 {
            match value {
                Value::Varint(value) => output.write_uint64(*field, *value),
                Value::Fixed64(value) => output.write_fixed64(*field, *value),
                Value::Bytes(value) => output.write_bytes(*field, value),
                Value::Fixed32(value) => output.write_fixed32(*field, *value),
            }
            .ok()?;
        }
        output.flush().ok()?;
        drop(output);
        Some(bytes)
    }

    /// A message of plain numbers.
    #[cfg(test)]
    pub(super) fn of(numbers: &[(u32, u64)]) -> Message {
        Message(numbers.iter().map(|(field, value)| (*field, Value::Varint(*value))).collect())
    }

    /// The same with a part at its end.
    #[cfg(test)]
    pub(super) fn with(mut self, field: u32, part: &Message) -> Message {
        self.0.push((field, Value::Bytes(part.encode().unwrap_or_default())));
        self
    }

    /// The first number `field`.
    pub(super) fn number(&self, field: u32) -> Option<u64> {
        self.0.iter().find_map(|(of, value)| match value {
            Value::Varint(value) if *of == field => Some(*value),
            _ => None,
        })
    }

    /// Sets the first number `field`, where there is one.
    pub(super) fn set(&mut self, field: u32, number: u64) {
        let found = self.0.iter_mut().find_map(|(of, value)| match value {
            Value::Varint(value) if *of == field => Some(value),
            _ => None,
        });
        if let Some(found) = found {
            *found = number;
        }
    }

    /// The parts `field`, in their order.
    pub(super) fn parts(&self, field: u32) -> impl Iterator<Item = Message> {
        self.0.iter().filter_map(move |(of, value)| match value {
            Value::Bytes(bytes) if *of == field => Message::parse(bytes),
            _ => None,
        })
    }

    /// Changes the parts `field`, and says whether any was; `change` gives back whether it has changed its part.
    pub(super) fn change(&mut self, field: u32, mut change: impl FnMut(&mut Message) -> bool) -> bool {
        let mut changed = false;
        for (of, value) in &mut self.0 {
            let Value::Bytes(bytes) = value else { continue };
            let Some(mut part) = (*of == field).then(|| Message::parse(bytes)).flatten() else { continue };
            if change(&mut part)
                && let Some(encoded) = part.encode()
            {
                *bytes = encoded;
                changed = true;
            }
        }
        changed
    }
}

/// The messages of an image whose second word is `magic`.
pub(super) fn records(image: &[u8], magic: u32) -> Option<Vec<&[u8]>> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?));
    if [word(0)?, word(4)?] != [COMMON, magic] {
        return None;
    }
    let (mut at, mut found) = (8, Vec::new());
    while at < image.len() {
        let length = usize::try_from(word(at)?).ok()?;
        let end = (at + 4).checked_add(length)?;
        found.push(image.get(at + 4..end)?);
        at = end;
    }
    Some(found)
}

/// An image with its messages changed; none when it is not as known, or `change` has changed nothing.
pub(super) fn edited(
    image: &[u8],
    magic: u32,
    mut change: impl FnMut(&mut Message) -> bool,
) -> Option<Vec<u8>> {
    let mut changed = false;
    let mut written = image.get(..8)?.to_vec();
    for record in records(image, magic)? {
        let edited =
            Message::parse(record).and_then(|mut message| change(&mut message).then(|| message.encode())?);
        changed |= edited.is_some();
        let record = edited.as_deref().unwrap_or(record);
        written.extend(u32::try_from(record.len()).ok()?.to_le_bytes());
        written.extend(record);
    }
    changed.then_some(written)
}

/// An image of these messages.
#[cfg(test)]
pub(super) fn image(magic: u32, messages: &[Message]) -> Vec<u8> {
    let mut image: Vec<u8> = [COMMON, magic].iter().flat_map(|word| word.to_le_bytes()).collect();
    for message in messages {
        let record = message.encode().unwrap_or_default();
        image.extend(u32::try_from(record.len()).unwrap_or_default().to_le_bytes());
        image.extend(record);
    }
    image
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u64>().prop_map(Value::Varint),
            any::<u64>().prop_map(Value::Fixed64),
            any::<u32>().prop_map(Value::Fixed32),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::Bytes),
        ]
    }

    proptest! {
        /// One number changes, and nothing else does.
        #[test]
        fn a_change_leaves_all_else_as_it_was(
            before in prop::collection::vec((2u32..100, value()), 0..8),
            after in prop::collection::vec((2u32..100, value()), 0..8),
            (old, new) in any::<(u64, u64)>(),
        ) {
            let message = |number| {
                let mut fields = before.clone();
                fields.push((1, Value::Varint(number)));
                fields.extend(after.clone());
                Message(fields)
            };
            let whole = |number| image(7, &[message(3), Message::of(&[]).with(5, &message(number))]);
            let changed = edited(&whole(old), 7, |outer| outer.change(5, |inner| {
                inner.set(1, new);
                true
            }));
            prop_assert_eq!(changed, Some(whole(new)));
            prop_assert_eq!(edited(&whole(old), 8, |_| true), None);
            prop_assert_eq!(edited(&whole(old), 7, |_| false), None);
        }

        /// Numbers that no field can have are refused.
        #[test]
        fn a_field_of_any_number_is_taken_apart_or_refused(field: u32, number: u64) {
            let mut bytes = Vec::new();
            let mut output = CodedOutputStream::vec(&mut bytes);
            output.write_raw_varint32(field << 3).unwrap();
            output.write_raw_varint64(number).unwrap();
            output.flush().unwrap();
            drop(output);
            let parsed = Message::parse(&bytes).and_then(|message| message.number(field << 3 >> 3));
            prop_assert_eq!(parsed, (field << 3 != 0).then_some(number));
        }

        /// Whatever bytes come, they are taken apart or refused.
        #[test]
        fn arbitrary_bytes_are_refused_or_put_together_again(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert_eq!(message.encode(), Some(bytes.clone()));
            }
            let framed = [&image(7, &[]), bytes.as_slice()].concat();
            let _ = edited(&framed, 7, |message| message.change(1, |part| { part.set(1, 7); true }));
        }
    }
}
