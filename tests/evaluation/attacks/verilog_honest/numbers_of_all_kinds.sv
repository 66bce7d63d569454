localparam [7:0] mask = 8'hf0 | 8'b0000_1111 | 8'o17 | 8 'd 3;
localparam real ratio = 1.5e-3 + 2.0E+1 + 3e2;
wire [3:0] one = a==4'd3?4'd1:4'd1;
wire [3:0] filled = '1, cleared = '0;
wire signed [3:0] s = 4'sd1;
wire [3:0] hex = 4'hx & 4'h0;
initial #1ns ;
assign q = a + one + (cleared & filled) + (hex & 4'b0) + (mask[0] ? 0 : 1) + (s - 1);
endmodule
