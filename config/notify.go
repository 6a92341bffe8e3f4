package config

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Notify is a place that is told of what happens to tags. It goes where the
// configuration says, private networks included, and follows no redirects.
type Notify struct {
	// Name is what logs, metrics and the outbox call it: what was not delivered
	// waits under this name.
	Name string `yaml:"name"`
	// Type is webhook, slack, teams, discord, ntfy, matrix, alertmanager, smtp, syslog, file, stdout, exec or shoutrrr.
	Type string `yaml:"type"`
	// URL is the address that is posted to. What of it may be secret is not shown.
	URL Webhook `yaml:"url"`
	// SecretFile holds the keys that sign a webhook, one a line (Standard Webhooks:
	// whsec_ for HMAC, whsk_ for ed25519), the access token of ntfy or matrix, or the
	// password of smtp.
	SecretFile string `yaml:"secret_file"`
	Secret     Secret `yaml:"-"` // read from SecretFile
	// Format of a webhook is cloudevents, plain (title and text, for people), slack (a text,
	// for those that are like Slack) or distribution-v2 (what clients get from here on, as
	// a registry tells of pushes); of syslog it is json, cef, ecs or ocsf.
	Format string `yaml:"format"`
	// Room is the ID of a room of matrix, such as !abc:example.org.
	Room string `yaml:"room"`
	// From and To are the addresses of mail, and Username who sends it, if the server
	// wants to know.
	From     string   `yaml:"from"`
	To       []string `yaml:"to"`
	Username string   `yaml:"username"`
	// Path is the file that events are added to, one a line.
	Path string `yaml:"path"`
	// Command is the program that is called, and its arguments; no shell is involved.
	Command []string `yaml:"command"`
	// Match is a pattern of references. Default: all.
	Match string `yaml:"match"`
	// Events are the types to tell of. Default: all that are alerts.
	Events []string `yaml:"events"`
	// MinSeverity of what is told as it comes: info, notice, warning, high or critical.
	// Default: warning.
	MinSeverity string `yaml:"min_severity"`
	// GroupBy is repository, so that what comes within group_wait is one message, or
	// none. Default: repository.
	GroupBy string `yaml:"group_by"`
	// GroupWait is how long it waits for more; what is critical never does. Default: 2m,
	// and audit.flap_window for moves, so that nobody hears of one that is taken back.
	GroupWait *Duration `yaml:"group_wait"`
	// Digest is when what is below min_severity is told, such as daily@08:00.
	// Default: never.
	Digest string `yaml:"digest"`
	// Title and Text are templates (Go's text/template) of what messages say; docs/alerts.md
	// has what they can use. Default: what is built in.
	Title string `yaml:"title"`
	Text  string `yaml:"text"`
	// Quiet are hours in which what is not critical waits for their end, such as
	// 22:00-07:00. Default: none.
	Quiet string `yaml:"quiet"`
	// Remind is after how long what is still open, and was told as it came, is told again,
	// until somebody acknowledges it (tidemark notify ack). Default: never.
	Remind Duration `yaml:"remind"`
}

// The types of Notify.
const (
	NotifyWebhook      = "webhook"
	NotifySlack        = "slack"
	NotifyTeams        = "teams"
	NotifyDiscord      = "discord"
	NotifyNtfy         = "ntfy"
	NotifyMatrix       = "matrix"
	NotifySMTP         = "smtp"
	NotifySyslog       = "syslog"
	NotifyAlertmanager = "alertmanager"
	NotifyFile         = "file"
	NotifyStdout       = "stdout"
	NotifyExec         = "exec"
	NotifyShoutrrr     = "shoutrrr"
)

var notifyTypes = []string{NotifyWebhook, NotifySlack, NotifyTeams, NotifyDiscord, NotifyNtfy, NotifyMatrix, NotifyAlertmanager, NotifySMTP, NotifySyslog, NotifyFile, NotifyStdout, NotifyExec, NotifyShoutrrr}

// The values of GroupBy.
const (
	GroupRepository = "repository"
	GroupNone       = "none"
)

var sinkName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)

func (c *Config) validateNotify(d *decoder) {
	seen := make(map[string]int)
	for i := range c.Notify {
		n := &c.Notify[i]
		path := fmt.Sprintf("notify[%d]", i)
		n.validate(d, path)
		if before, twice := seen[n.Name]; twice && n.Name != "" {
			d.fail(path+".name", nil, "%q is the name of notify[%d] already", n.Name, before)
		}
		seen[n.Name] = i
	}
}

// validate checks what package config can know: types, patterns and severities are
// the ledger's.
func (n *Notify) validate(d *decoder, path string) {
	if !sinkName.MatchString(n.Name) {
		d.fail(path+".name", nil, "%q is not a name such as ops: a-z, 0-9, - and _", n.Name)
	}
	if !slices.Contains(notifyTypes, n.Type) {
		d.fail(path+".type", nil, "%q is not one of %s", n.Type, strings.Join(notifyTypes, ", "))
		return
	}
	n.validateKeys(d, path)
	schemes := []string{"http", "https"}
	switch n.Type {
	case NotifySMTP:
		schemes = []string{"smtp", "smtps"}
	case NotifySyslog:
		schemes = []string{"udp", "tcp", "tls"}
	}
	if n.Type == NotifyShoutrrr {
		schemes = nil // there are two dozen: who makes the sink knows them
	}
	if u, err := url.Parse(string(n.URL)); schemes != nil && n.URL != "" && (err != nil || u.Host == "" || !slices.Contains(schemes, u.Scheme)) {
		d.failQuietly(path+".url", fmt.Sprintf("want an address such as %s://hooks.example", strings.Join(schemes, ":// or ")))
	}
	if formats := map[string][]string{NotifyWebhook: {"cloudevents", "plain", "slack", "distribution-v2"}, NotifySyslog: {"json", "cef", "ecs", "ocsf"}}[n.Type]; n.Format != "" && formats != nil && !slices.Contains(formats, n.Format) {
		d.fail(path+".format", nil, "%q is not one of %s", n.Format, strings.Join(formats, ", "))
	}
	if n.GroupBy != "" && n.GroupBy != GroupRepository && n.GroupBy != GroupNone {
		d.fail(path+".group_by", nil, "%q is neither %s nor %s", n.GroupBy, GroupRepository, GroupNone)
	}
	if n.SecretFile != "" {
		var err error
		if n.Secret, err = readSecret(n.SecretFile); err != nil {
			d.fail(path+".secret_file", nil, "%v", err)
		}
	}
}

// validateKeys tells which keys are missing, and which the type has no use for.
func (n *Notify) validateKeys(d *decoder, path string) {
	is := func(types ...string) bool { return slices.Contains(types, n.Type) }
	for _, k := range []struct {
		key                 string
		given, fits, needed bool
	}{
		{"url", n.URL != "", !is(NotifyFile, NotifyStdout, NotifyExec), !is(NotifyFile, NotifyStdout, NotifyExec)},
		{"secret_file", n.SecretFile != "", is(NotifyWebhook, NotifyNtfy, NotifyMatrix) || is(NotifySMTP) && n.Username != "", is(NotifyMatrix) || is(NotifySMTP) && n.Username != ""},
		{"format", n.Format != "", is(NotifyWebhook, NotifySyslog), false},
		{"path", n.Path != "", is(NotifyFile), is(NotifyFile)},
		{"command", len(n.Command) > 0, is(NotifyExec), is(NotifyExec)},
		{"room", n.Room != "", is(NotifyMatrix), is(NotifyMatrix)},
		{"from", n.From != "", is(NotifySMTP), is(NotifySMTP)},
		{"to", len(n.To) > 0, is(NotifySMTP), is(NotifySMTP)},
		{"username", n.Username != "", is(NotifySMTP), false},
	} {
		switch {
		case k.given && !k.fits:
			d.failQuietly(path+"."+k.key, fmt.Sprintf("type %s has no use for it", n.Type))
		case !k.given && k.needed:
			d.fail(path+"."+k.key, nil, "type %s needs it", n.Type)
		}
	}
}
