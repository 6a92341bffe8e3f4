package proxy

import (
	"context"
	"fmt"
	"net/url"

	"tidemark/audit"
)

// Watch has the ledger ask upstream what ref means, as one who asks on a schedule.
func (c *Contents) Watch(ctx context.Context, ledger *audit.Ledger, ref audit.Ref) (audit.Answer, error) {
	repo, err := c.repository(ref)
	if err != nil {
		return audit.Answer{}, err
	}
	return ledger.Watch(ctx, ref, repo.ask(ref.Tag, "poll"))
}

// Tags returns the tags of a repository as upstream lists them.
func (c *Contents) Tags(ctx context.Context, upstream, repository string) ([]string, error) {
	repo, err := c.repository(audit.Ref{Upstream: upstream, Repository: repository})
	if err != nil {
		return nil, err
	}
	var all []string
	query := url.Values{"n": {"1000"}}
	for range tagPages {
		tags, next, err := repo.upstream.Tags(ctx, repository, query)
		if err != nil {
			return nil, err
		}
		if all = append(all, tags...); next == nil {
			return all, nil
		}
		query = next
	}
	return nil, fmt.Errorf("%s/%s has more tags than %d pages hold", upstream, repository, tagPages)
}
