// Package smtp sends mail.
package smtp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"

	"github.com/wneessen/go-mail"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is a mail server and who is written to.
type Sink struct {
	client *mail.Client
	from   string
	to     []string
}

// New returns the sink at smtp://host[:port], which uses STARTTLS when it is offered
// and insists on it when there is a password, or smtps://host[:port]. It dials nothing.
func New(address, from string, to []string, username, password string) (*Sink, error) {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" || u.Scheme != "smtp" && u.Scheme != "smtps" || u.User != nil {
		return nil, errors.New("want an address such as smtp://mail.example:587 or smtps://mail.example, without a name or a password")
	}
	options := []mail.Option{mail.WithTimeout(notify.SendTimeout)}
	switch {
	case u.Scheme == "smtps":
		options = append(options, mail.WithSSLPort(false))
	case username != "":
		options = append(options, mail.WithTLSPortPolicy(mail.TLSMandatory))
	default:
		options = append(options, mail.WithTLSPolicy(mail.TLSOpportunistic), mail.WithPort(mail.DefaultPort))
	}
	if p := u.Port(); p != "" {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", p, err)
		}
		options = append(options, mail.WithPort(n))
	}
	if username != "" {
		options = append(options, mail.WithSMTPAuth(mail.SMTPAuthAutoDiscover), mail.WithUsername(username), mail.WithPassword(password))
	}
	client, err := mail.NewClient(u.Hostname(), options...)
	if err != nil {
		return nil, err
	}
	s := &Sink{client, from, to}
	_, err = s.message(notify.Message{ID: "check", Items: []notify.Item{{Clients: -1}}}) // whether it can be addressed
	return s, err
}

func (s *Sink) message(m notify.Message) (*mail.Msg, error) {
	msg := mail.NewMsg()
	if err := msg.From(s.from); err != nil {
		return nil, fmt.Errorf("from: %w", err)
	}
	if err := msg.To(s.to...); err != nil {
		return nil, fmt.Errorf("to: %w", err)
	}
	msg.Subject(m.Title())
	msg.SetMessageIDWithValue(m.ID + "@tidemark") // the same when it is sent again: readers show it once
	msg.SetDateWithValue(m.Items[0].Event.Time)
	if m.Severity() >= audit.High {
		msg.SetImportance(mail.ImportanceHigh)
	}
	msg.SetGenHeader("Auto-Submitted", "auto-generated") // RFC 3834: nobody's vacation answers
	msg.SetBodyString(mail.TypeTextPlain, m.Text()+"\n")
	return msg, nil
}

// Send implements notify.Sink. A server that refuses for good is tried again, too: most
// such refusals are somebody's mistake.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	msg, err := s.message(m)
	if err != nil {
		return err
	}
	err = s.client.DialAndSendWithContext(ctx, msg)
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return fmt.Errorf("the mail server did not answer in time: %w", err)
	}
	return err
}
