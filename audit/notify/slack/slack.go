// Package slack posts to an incoming webhook of Slack, or of who understands the
// same: Mattermost, Rocket.Chat.
package slack

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	"tidemark/audit/notify"
)

// A Sink is an incoming webhook.
type Sink struct{ post *notify.Poster }

// New returns the sink at an address.
func New(address string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	return &Sink{post}, err
}

// textMost is what a section takes, in characters (Block Kit, "Section block"), less
// what quotes it.
const textMost = 2900

// escape keeps text from being read as markup: < and > make mentions and links.
var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "```", "'''")

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	type text struct {
		Type string `json:"type"`
		Text string `json:"text"`
	}
	type block struct {
		Type string `json:"type"`
		Text text   `json:"text"`
	}
	body, err := json.Marshal(struct {
		Text   string  `json:"text"` // of the notification, and for readers aloud
		Blocks []block `json:"blocks"`
	}{
		escape.Replace(m.Title()),
		[]block{
			{"section", text{"mrkdwn", "*" + notify.Clip(escape.Replace(m.Title()), textMost) + "*"}},
			{"section", text{"mrkdwn", "```" + notify.Clip(escape.Replace(m.Text()), textMost) + "```"}},
		},
	})
	if err != nil {
		return err
	}
	return s.post.Post(ctx, http.Header{"Content-Type": {"application/json"}}, body)
}
