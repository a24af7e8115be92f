//! What an update says in cgroup v2's own terms: any file of any controller.

use std::collections::HashMap;

use super::{LimitError, Setting, set};

pub(super) fn settings(unified: &HashMap<String, String>, all: &mut Vec<Setting>) -> Result<(), LimitError> {
    let mut unified: Vec<_> = unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        // A file of a controller is called like `memory.max`, and never by dots alone.
        let named =
            file.split_once('.').is_some_and(|(controller, name)| !controller.is_empty() && !name.is_empty());
        if file.contains(['/', '\0']) || !named {
            return Err(LimitError::NoFile(file.clone()));
        }
        // Freezing, killing and moving processes is what a sleep is made of.
        if file.starts_with("cgroup.") && !file.starts_with("cgroup.max.") {
            return Err(LimitError::NoLimit(file.clone()));
        }
        set(all, file, value.clone());
    }
    Ok(())
}
