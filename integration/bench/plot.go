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
	"fmt"
	"image/color"
	"math"
	"path/filepath"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// curve is a line of a picture: ratios over a size.
type curve struct {
	Picture string  `json:"picture"`
	Name    string  `json:"name"`
	Points  []point `json:"points"`
}

type point struct {
	X     float64 `json:"x"`
	Ratio summary `json:"ratio"`
}

// The pictures.
const (
	growthPicture = "growth"
	pullPicture   = "pull"
)

var pictures = map[string]struct{ title, x, y string }{
	growthPicture: {
		"Preparing one image layer on a node that fills", "snapshots on the node", "times as long as with 10",
	},
	pullPicture: {
		"Pulling an image over CRI", "layers of the image", "times as long as a plain HTTP fetch",
	},
}

var colors = []color.Color{
	color.RGBA{R: 0x00, G: 0x6d, B: 0xb6, A: 0xff},
	color.RGBA{R: 0xd9, G: 0x5f, B: 0x02, A: 0xff},
	color.RGBA{R: 0x66, G: 0x66, B: 0x66, A: 0xff},
	color.RGBA{R: 0x1b, G: 0x9e, B: 0x77, A: 0xff},
	color.RGBA{R: 0x75, G: 0x70, B: 0xb3, A: 0xff},
}

// draw writes one SVG for each picture.
func (r *report) draw(dir string) error {
	for name, about := range pictures {
		p := plot.New()
		p.Title.Text, p.X.Label.Text, p.Y.Label.Text = about.title, about.x, about.y
		p.BackgroundColor = color.White // pages may be dark
		p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
		p.Y.Tick.Marker = ratioTicks
		p.Y.Min, p.Y.Max = 0.5, 2
		p.Legend.Top, p.Legend.Left = true, true
		p.Legend.Padding, p.Legend.YOffs = vg.Points(2), vg.Points(-8)
		p.Add(plotter.NewGrid())

		var sizes []plot.Tick
		for i, c := range r.curvesOf(name) {
			if err := addCurve(p, c, colors[i%len(colors)], glyphs[i%len(glyphs)]); err != nil {
				return err
			}
			if i == 0 {
				for _, pt := range c.Points {
					sizes = append(sizes, plot.Tick{Value: pt.X, Label: fmt.Sprintf("%.0f", pt.X)})
				}
			}
		}
		p.X.Tick.Marker = plot.ConstantTicks(sizes)
		p.X.Max *= 1.5 // room for the last label
		if err := p.Save(18*vg.Centimeter, 11*vg.Centimeter, filepath.Join(dir, name+".svg")); err != nil {
			return fmt.Errorf("draw %s: %w", name, err)
		}
	}
	return nil
}

var glyphs = []draw.GlyphDrawer{draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}}

// ratioTicks marks 1, 2, 5, 10 and so on.
var ratioTicks = plot.TickerFunc(func(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	for decade := -1; math.Pow10(decade) <= high; decade++ {
		for _, m := range []float64{1, 2, 5} {
			if v := m * math.Pow10(decade); v >= low*0.999 && v <= high*1.001 {
				ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'f', -1, 64)})
			}
		}
	}
	return ticks
})

// curvePoints gives the plotter a curve with its quartiles as error bars.
type curvePoints struct{ curve }

func (c curvePoints) Len() int                    { return len(c.Points) }
func (c curvePoints) XY(i int) (float64, float64) { return c.Points[i].X, c.Points[i].Ratio.Median }
func (c curvePoints) YError(i int) (float64, float64) {
	r := c.Points[i].Ratio
	return r.Median - r.Low, r.High - r.Median
}

func addCurve(p *plot.Plot, c curve, col color.Color, glyph draw.GlyphDrawer) error {
	line, marks, err := plotter.NewLinePoints(curvePoints{c})
	if err != nil {
		return fmt.Errorf("draw %s: %w", c.Name, err)
	}
	bars, err := plotter.NewYErrorBars(curvePoints{c})
	if err != nil {
		return fmt.Errorf("draw %s: %w", c.Name, err)
	}
	line.Color, marks.Color, bars.Color = col, col, col
	line.Width = vg.Points(1.5)
	marks.Shape = glyph
	p.Add(line, marks, bars)
	p.Legend.Add(c.Name, line, marks)
	return nil
}

func (r *report) curvesOf(picture string) []curve {
	var out []curve
	for _, c := range r.Curves {
		if c.Picture == picture {
			out = append(out, c)
		}
	}
	return out
}
