//! The scenarios, by number. One that needs no guest of its own takes the one that the scenario before it left, settled
//! on some image.

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use crate::backend::Backend;
use crate::lab::{Kind, Lab, Stock};

mod arguments;
mod bootc;
mod faults;
mod guest;
mod neighbours;
mod overlay;
mod power;
mod refusal;
mod selinux;
mod soak;
mod update;
mod writes;

type Done<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;
type WithLab = for<'a> fn(&'a mut Lab) -> Done<'a>;

/// What a scenario does, and with which guest.
#[derive(Clone, Copy)]
pub enum Run {
    /// Any that is settled; it is left settled.
    Shared(WithLab),
    /// A new one of that kind, which nobody gets afterwards.
    Own(Kind, WithLab),
    /// As many as it wants.
    Itself(for<'a> fn(&'a Stock) -> Done<'a>),
}

/// One scenario.
pub struct Scenario {
    /// Its number; they run in this order.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Whether it is one of the few that every change has to pass.
    pub short: bool,
    /// Whether it runs only when it is named.
    pub on_demand: bool,
    /// Whether there is nothing to show with another backend.
    pub only: Option<Backend>,
    /// What it does.
    pub run: Run,
}

const fn scenario(number: u32, name: &'static str, about: &'static str, run: WithLab) -> Scenario {
    Scenario { number, name, about, short: false, on_demand: false, only: None, run: Run::Shared(run) }
}

impl Scenario {
    const fn short(self) -> Self {
        Self { short: true, ..self }
    }

    const fn own(self, kind: Kind) -> Self {
        match self.run {
            Run::Shared(run) | Run::Own(_, run) => Self { run: Run::Own(kind, run), ..self },
            Run::Itself(_) => self,
        }
    }

    const fn on_demand(self) -> Self {
        Self { on_demand: true, ..self }
    }

    const fn only(self, backend: Backend) -> Self {
        Self { only: Some(backend), ..self }
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
    })
    .short(),
    scenario(4, "back", "the pool goes back to the image before", |lab| Box::pin(update::back(lab))),
    scenario(5, "index", "the target's digest is that of an index", |lab| Box::pin(neighbours::index_digest(lab))),
    scenario(6, "power-staged", "the power goes when the image is staged", |lab| Box::pin(power::after_staging(lab))),
    scenario(7, "power-attempt", "the power goes when the attempt is on record", |lab| {
        Box::pin(power::after_the_attempt(lab))
    })
    .short(),
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
    scenario(18, "finalizer-late", "nothing would finalize the deployment: no drain, no reboot", |lab| {
        Box::pin(neighbours::finalizer_late(lab))
    })
    .short(),
    scenario(19, "no-effect", "a transaction ends well and staged nothing: not believed", |lab| {
        Box::pin(neighbours::no_effect(lab))
    }),
    scenario(
        20,
        "selinux",
        "one update with SELinux enforcing for the agent's domain, which is denied nothing",
        |lab| Box::pin(selinux::update(lab)),
    )
    .own(Kind::Selinux),
    Scenario {
        number: 21,
        name: "faults",
        about: "an agent that misbehaves in one way is caught by the scenario for it",
        short: false,
        on_demand: false,
        only: None,
        run: Run::Itself(|stock| Box::pin(faults::are_caught(stock))),
    },
    scenario(
        22,
        "bootc-signed",
        "bootc enforces the policy where that means anything, and the origin says so",
        |lab| Box::pin(bootc::signed(lab)),
    )
    .own(Kind::Plain)
    .only(Backend::Bootc),
    Scenario {
        number: 23,
        name: "overlay",
        about: "the host tool of an overlay takes the stand-in's place",
        short: false,
        on_demand: false,
        only: None,
        run: Run::Itself(|stock| Box::pin(overlay::is_used(stock))),
    },
    scenario(24, "power-back", "the power goes when the attempt to go back is on record", |lab| {
        Box::pin(power::on_the_way_back(lab))
    }),
    scenario(25, "staged-refused", "the policy rejects what is staged: no reboot boots it, or it is told", |lab| {
        Box::pin(refusal::staged_then_refused(lab))
    }),
    scenario(26, "policy-replaced", "the policy changes between staging and reboot, its time does not", |lab| {
        Box::pin(refusal::policy_replaced_while_held(lab))
    }),
    scenario(27, "kernel-arguments", "quoted and ordered kernel arguments reach the kernel as configured", |lab| {
        Box::pin(arguments::in_order(lab))
    })
    .own(Kind::Plain)
    .only(Backend::RpmOstree),
    scenario(28, "no-arguments", "somebody stages something else by hand, without kernel arguments", |lab| {
        Box::pin(neighbours::staged_without_arguments(lab))
    }),
    scenario(29, "locked", "the desired image was staged by hand and its finalization is locked", |lab| {
        Box::pin(neighbours::staged_locked(lab))
    })
    .only(Backend::RpmOstree),
    scenario(90, "soak", "ten updates back to back leave nothing behind", |lab| Box::pin(soak::ten(lab)))
        .own(Kind::Plain)
        .on_demand(),
];
