//! What neighbours do to an agent, and what busy ones get.

use super::{cell, spread, table};
use crate::plan::Company;
use crate::record::Share;
use crate::results::Results;
use crate::statistics::{Summary, ratio};

/// An agent in company.
pub fn company(results: &Results) -> String {
    let p99 = |company: Company| {
        let asked = results.asked().find(|asked| asked.company == company)?;
        Summary::of(asked.answer_us.iter().copied()).map(|summary| summary.p99)
    };
    let alone = p99(Company::Nobody);
    let row = |asked: &crate::record::Asked| {
        let times = Summary::of(asked.answer_us.iter().copied());
        let against = times.zip(alone).and_then(|(times, alone)| ratio(times.p99, alone));
        let mut row = vec![asked.company.to_string(), asked.answer_us.len().to_string()];
        row.extend(spread(times));
        row.push(cell(against.map(|ratio| format!("{ratio:.1}"))));
        row.push(if asked.wakes > 0 { asked.wakes.to_string() } else { cell(None) });
        row
    };
    let rows: Vec<_> = results.asked().map(row).collect();
    table(&["agent", "n", "first byte: min", "p50", "p95", "p99", "p99 to alone", "wakes meanwhile"], &rows)
}

/// What two busy agents get of the processors.
pub fn shares(results: &Results) -> String {
    let row = |share: &Share| {
        let percent =
            |part: u64, of: u64| cell(ratio(part * 100, of).map(|percent| format!("{percent:.1} %")));
        let [one, other] = share.weights.map(u64::from);
        vec![
            format!("{one} : {other}"),
            if share.slept { "after a sleep" } else { "before it slept" }.to_owned(),
            percent(one, one + other),
            percent(share.used_us[0], share.used_us.iter().sum()),
        ]
    };
    let rows: Vec<_> = results.shares().map(row).collect();
    table(&["CPU weights", "the first one", "is promised", "gets"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Asked, Record};
    use crate::results::tests::results;

    #[test]
    fn company_is_compared_with_none_and_shares_with_weights() {
        let mut results = results();
        let asked = |company, us: u64, wakes| Record::Asked(Asked { company, answer_us: vec![us; 3], wakes });
        results.records.extend([
            asked(Company::Nobody, 2_000, 0),
            asked(Company::Waking(10), 3_000, 7),
            Record::Share(Share { weights: [100, 300], slept: true, used_us: [26, 74] }),
        ]);
        let text = company(&results);
        let row = text.lines().find(|line| line.contains("beside 10 that wake")).unwrap_or_default();
        assert!(row.contains("| 1.5 ") && row.contains("3.00 ms") && row.contains("| 7 "), "{text}");
        let text = shares(&results);
        assert!(
            text.contains("| 100 : 300 ") && text.contains("25.0 %") && text.contains("26.0 %"),
            "{text}"
        );
    }

    #[test]
    fn a_run_without_neighbours_has_no_tables() {
        assert_eq!((company(&results()), shares(&results())), (String::new(), String::new()));
    }
}
