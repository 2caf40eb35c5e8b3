/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// series is what was measured of one contender, a number for each round, in the
// order of the rounds.
type series []float64

// contender is one side of a comparison. measure does once what is compared and
// returns what it took, in seconds or whatever unit the comparison is in.
type contender struct {
	name    string
	measure func() (float64, error)
}

// interleave lets the contenders take turns, so that whatever else the machine
// does meets all of them. Their order changes from round to round, by chance,
// because one that has written much leaves work to the disk for whoever comes
// next. A first round warms up and is not counted.
func interleave(ctx context.Context, rounds int, contenders ...contender) (map[string]series, error) {
	result := map[string]series{}
	order := rand.New(rand.NewPCG(0, 0)) // the same in each run
	for round := range rounds + 1 {
		for _, i := range order.Perm(len(contenders)) {
			c := contenders[i]
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			v, err := c.measure()
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", c.name, round, err)
			}
			if round > 0 {
				result[c.name] = append(result[c.name], v)
			}
		}
	}
	return result, nil
}

// timed returns the seconds that f takes.
func timed(f func() error) (float64, error) {
	start := time.Now()
	err := f()
	return time.Since(start).Seconds(), err
}

// summary is a median and the quartiles around it.
type summary struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

func summarize(s series) summary {
	sorted := slices.Sorted(slices.Values(s))
	return summary{quantile(sorted, 0.5), quantile(sorted, 0.25), quantile(sorted, 0.75)}
}

// quantile interpolates between the two nearest of sorted figures.
func quantile(sorted []float64, p float64) float64 {
	at := p * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (at-float64(below))*(sorted[above]-sorted[below])
}

// each combines what two or more contenders took in the same round.
func each(f func(v ...float64) float64, all ...series) series {
	var out series
	for round := range all[0] {
		v := make([]float64, len(all))
		for i, s := range all {
			v[i] = s[round]
		}
		out = append(out, f(v...))
	}
	return out
}

func sum(v ...float64) float64 {
	total := 0.0
	for _, x := range v {
		total += x
	}
	return total
}

func minus(v ...float64) float64 { return v[0] - v[1] }

func over(v ...float64) float64 { return v[0] / v[1] }

// always is a series for something that does not change from round to round.
func always(v float64, like series) series {
	s := make(series, len(like))
	for i := range s {
		s[i] = v
	}
	return s
}
