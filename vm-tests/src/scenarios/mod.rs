//! The scenarios, by number. One that needs no guest of its own takes the one that the scenario before it left, settled
//! on some image.

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use crate::lab::Lab;

mod guest;
mod neighbours;
mod power;
mod refusal;
mod soak;
mod update;
mod writes;

type Run = for<'a> fn(&'a mut Lab) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Which guest a scenario takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// Any that is settled; it is left settled.
    Shared,
    /// A new one, which nobody gets afterwards.
    Own,
}

/// One scenario.
pub struct Scenario {
    /// Its number; they run in this order.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Which guest it takes.
    pub guest: Guest,
    /// Whether it is one of the few that every change has to pass.
    pub short: bool,
    /// Whether it runs only when it is named.
    pub on_demand: bool,
    /// What it does.
    pub run: Run,
}

const fn scenario(number: u32, name: &'static str, about: &'static str, run: Run) -> Scenario {
    Scenario { number, name, about, guest: Guest::Shared, short: false, on_demand: false, run }
}

impl Scenario {
    const fn short(self) -> Self {
        Self { short: true, ..self }
    }

    const fn own_guest(self) -> Self {
        Self { guest: Guest::Own, ..self }
    }

    const fn on_demand(self) -> Self {
        Self { on_demand: true, ..self }
    }
}

/// All of them, in order.
pub const ALL: &[Scenario] = &[
    scenario(0, "guest", "the guest is what it claims, and the agent's sandbox is in force", |lab| {
        Box::pin(guest::is_what_it_claims(lab))
    })
    .short(),
    scenario(1, "update", "a signed image is staged, drained for, booted and reported", |lab| {
        Box::pin(update::forward(lab))
    })
    .short(),
    scenario(2, "unsigned", "an unsigned image is refused by agent and pull; nothing changes", |lab| {
        Box::pin(refusal::unsigned(lab))
    })
    .short(),
    scenario(3, "strange-key", "an image signed with a key that the policy does not name is refused", |lab| {
        Box::pin(refusal::strange_key(lab))
    }),
    scenario(4, "back", "the pool goes back to the image before", |lab| Box::pin(update::back(lab))),
    scenario(5, "index", "the target's digest is that of an index", |lab| Box::pin(neighbours::index_digest(lab))),
    scenario(6, "power-staged", "the power goes when the image is staged", |lab| Box::pin(power::after_staging(lab))),
    scenario(7, "power-attempt", "the power goes when the attempt is on record", |lab| {
        Box::pin(power::after_the_attempt(lab))
    }),
    scenario(8, "power-finalizing", "the power goes while the deployment is finalized", |lab| {
        Box::pin(power::during_finalization(lab))
    }),
    scenario(9, "finalization-fails", "/boot cannot be written: two attempts, then a refusal that says why", |lab| {
        Box::pin(power::finalization_fails(lab))
    }),
    scenario(10, "registry-gone", "the registry dies in the middle of a layer", |lab| {
        Box::pin(neighbours::registry_gone(lab))
    }),
    scenario(11, "api-gone", "the API server is away while the new image boots", |lab| {
        Box::pin(neighbours::api_gone_at_boot(lab))
    }),
    scenario(
        12,
        "certificate",
        "the kubelet's certificate expires in the middle of an update and is replaced",
        |lab| Box::pin(neighbours::certificate_rotates(lab)),
    ),
    scenario(13, "human", "somebody stages something else by hand, twice", |lab| {
        Box::pin(neighbours::human_deploys(lab))
    }),
    scenario(14, "retarget", "the target changes while an image is pulled", |lab| Box::pin(neighbours::retarget(lab))),
    scenario(15, "self-update", "the image brings another agent, which reports the update", |lab| {
        Box::pin(update::of_the_agent(lab))
    }),
    scenario(16, "key-rotation", "the image brings the key that the next one is signed with", |lab| {
        Box::pin(refusal::key_rotation(lab))
    }),
    scenario(17, "writes", "the agent opens no file for writing in a whole update", |lab| Box::pin(writes::none(lab))),
    scenario(90, "soak", "ten updates back to back leave nothing behind", |lab| Box::pin(soak::ten(lab)))
        .own_guest()
        .on_demand(),
];
